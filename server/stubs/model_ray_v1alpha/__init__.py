"""Generated from proto/user_defined.proto by `make generate`; never edited by hand."""
