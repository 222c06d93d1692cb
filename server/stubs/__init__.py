"""Generated stubs of other people's contracts: `make generate`."""
