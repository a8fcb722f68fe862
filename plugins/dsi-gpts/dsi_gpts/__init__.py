"""dsi policies, one file a family; each file is a plugin of its own."""
