"""Runtimes that a profile can measure, one file each.

A runtime has `require(provider)`, which raises a `ProfileError` where it cannot run; `open_session(bundle, *, threads,
provider)`, which returns something with the methods of `edgeadapt.runtime.Session`; and `version()`.
"""
