"""One file per format that adapters are written in: `DTYPES` and `encode`.

`encode(resolved, base, trained_on, dtype) -> (bytes, facts)`: a whole file, and what people may want to know of it;
`trained_on` is what the adapter's own files say of its base. AdapterError for what the format cannot hold.
"""
