"""An OpenAI-compatible server of one model: transformers' handlers and continuous batching, checks of our own."""
