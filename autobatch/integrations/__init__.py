"""autobatch inside training frameworks: each module needs the framework that it is named after, and nothing else does."""
