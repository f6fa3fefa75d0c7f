"""Graph to Graph with smaller weights (`quantize`), then to files (`pack`). Schemes are files in `schemes/`."""
