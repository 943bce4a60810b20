//! The interface of `brotli` as pingora uses it, without the compression. Why: this crate's Cargo.toml.

use std::io;

/// Refuses to write, so that no answer can go out half compressed.
pub struct CompressorWriter<W>(W);

/// Refuses to write, so that nothing passes that was not read.
pub struct DecompressorWriter<W>(W);

fn unavailable<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this build has no brotli"))
}

impl<W> CompressorWriter<W> {
    pub fn new(writer: W, _buffer_bytes: usize, _quality: u32, _window: u32) -> Self {
        Self(writer)
    }
}

impl<W> DecompressorWriter<W> {
    pub fn new(writer: W, _buffer_bytes: usize) -> Self {
        Self(writer)
    }
}

macro_rules! writer {
    ($name:ident) => {
        impl<W> $name<W> {
            pub fn get_ref(&self) -> &W {
                &self.0
            }

            pub fn get_mut(&mut self) -> &mut W {
                &mut self.0
            }
        }

        impl<W> io::Write for $name<W> {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                unavailable()
            }

            fn flush(&mut self) -> io::Result<()> {
                unavailable()
            }
        }
    };
}

writer!(CompressorWriter);
writer!(DecompressorWriter);
