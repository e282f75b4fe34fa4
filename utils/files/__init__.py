"""Safe file access: atomic writes; tensors, arrays and images are read without executing pickles."""
