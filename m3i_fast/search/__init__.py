"""A local page on which a person searches pictures by words, by a picture and by a patch of one."""
