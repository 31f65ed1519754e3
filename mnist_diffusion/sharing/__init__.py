"""Pipeline folders: read untrusted ones, write, describe, push and pull them."""
