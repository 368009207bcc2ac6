/* Which sources this library was built from: what source_hash.py says of their folder. */
const char *turn_source(void);
