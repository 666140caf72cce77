"""A package, so that no dependency that installs a package `tests` shadows it."""
