"""The commands: parse, call one workflow, print. Heavy imports stand inside them, so that --help is instant."""
