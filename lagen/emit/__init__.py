"""The only makers of text: closed printers from plans to source, and the templates they fill."""
