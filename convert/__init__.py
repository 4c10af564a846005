"""fourbit's converter: a checkpoint folder in, a GGUF file out."""
