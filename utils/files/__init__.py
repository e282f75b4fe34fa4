"""What is read and written, safely: files whole or not at all, tensors, arrays and images without unpickling."""
