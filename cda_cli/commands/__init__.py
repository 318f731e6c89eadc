"""The commands parse, call one workflow and print. They import what is heavy when they run: --help stays instant."""
