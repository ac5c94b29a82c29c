"""An OpenAI-compatible server over the engine. It needs the extra `serving`; nothing else in the package imports it."""
