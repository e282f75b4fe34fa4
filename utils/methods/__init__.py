"""The distillation methods of stage 1."""
