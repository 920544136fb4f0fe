"""OpenAI's endpoints, translated."""
