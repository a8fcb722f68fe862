"""The policies that ship with dsi: one file an architecture family, found through the same entry points as anyone's."""
