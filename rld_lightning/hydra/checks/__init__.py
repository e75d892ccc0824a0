"""Checks of command lines and configurations, which report mistakes before slow imports."""
