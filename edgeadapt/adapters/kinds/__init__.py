"""One file per kind of adapter: `claims`, `check`, `check_tensors`, `resolve`, `describe` and `TERMS`."""
