//! asynchronous NBD client.
