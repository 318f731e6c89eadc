"""What transformers runs for this folder with trust_remote_code=True. The model itself is in the package cda-cli.

`cda export` copies this file into the folder that it writes.
"""

from cda_cli.interchange.hf import CdaConfig, CdaForCausalLM

__all__ = ["CdaConfig", "CdaForCausalLM"]
