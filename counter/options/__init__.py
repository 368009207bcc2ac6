"""From text to one frozen record of settings, and how values are written."""
