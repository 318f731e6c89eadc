"""`python -m cda_cli` is `cda`."""

from cda_cli.main import run

if __name__ == "__main__":
    run()
