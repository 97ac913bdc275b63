//! Owns the programs of the development object: probes for the tests, and the flood of the bench.
//! Called through `BPF_PROG_TEST_RUN`.
//! Must never be in the object that the daemon loads.

mod flood;
mod probe;
