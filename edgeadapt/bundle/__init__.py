"""The bundle, format 1: what an app ships. docs/formats/bundle-1.md is the normative text."""
