//! libFuzzer's way into [`fuzz::news`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::news(data));
