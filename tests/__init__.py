"""The test suite of dsi; it mirrors the source tree."""
