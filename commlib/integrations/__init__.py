"""Where frameworks let a library in: each module only translates names and futures."""
