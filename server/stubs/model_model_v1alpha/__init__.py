"""Generated from proto/model_public.proto by `make generate`; never edited by hand."""
