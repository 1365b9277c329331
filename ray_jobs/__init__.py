"""The verbs: one file each, run on a Ray cluster. The only package whose modules import ray."""
