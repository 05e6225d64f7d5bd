"""Placeholder docstring, replaced with the package it opens."""
