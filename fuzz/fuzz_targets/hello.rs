//! libFuzzer's way into [`fuzz::hello`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::hello(data));
