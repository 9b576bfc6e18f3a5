"""Tables and pictures of README.md and docs/ from the result files. It imports the rest; nothing imports it."""
