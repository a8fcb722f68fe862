"""dsi's own checks, a module for each theme; `dsi.testing.plugin` registers them."""
