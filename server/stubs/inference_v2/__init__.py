"""Generated from proto/open_inference.proto by `make generate`; never edited by hand."""
