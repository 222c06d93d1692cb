"""Generated from proto/text_to_image.proto by `make generate`; never edited by hand."""
