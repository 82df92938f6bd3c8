"""One file per family, named after the `model_type` of its config."""
