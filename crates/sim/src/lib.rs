//! a simulated XenServer pool.
