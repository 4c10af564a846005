"""fourbit's benchmark: models in, numbers and a report out."""
