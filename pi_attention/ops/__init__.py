"""The operator: `api` is public, each other module is one step of one implementation."""
