"""Integrations with other libraries, each imported on its own: `import fastattn.integrations.transformers`."""
