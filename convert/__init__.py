"""A published checkpoint into one file a layer. Needs no JAX."""

from convert.job import RESUME, Summary, convert_checkpoint
from convert.verify import Verdict, verify_folder

__all__ = ["RESUME", "Summary", "Verdict", "convert_checkpoint", "verify_folder"]
