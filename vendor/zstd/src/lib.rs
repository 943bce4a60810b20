//! The interface of `zstd` as pingora uses it, without the compression. Why: this crate's Cargo.toml.

use std::io;

fn unavailable<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this build has no zstd"))
}

pub mod stream {
    pub mod write {
        use crate::unavailable;
        use std::io;

        /// Refuses to write, so that no answer can go out half compressed.
        pub struct Encoder<'a, W> {
            writer: W,
            _dictionary: std::marker::PhantomData<&'a ()>,
        }

        impl<W> Encoder<'_, W> {
            pub fn new(writer: W, _level: i32) -> io::Result<Self> {
                Ok(Self { writer, _dictionary: std::marker::PhantomData })
            }

            pub fn with_dictionary(writer: W, level: i32, _dictionary: &[u8]) -> io::Result<Self> {
                Self::new(writer, level)
            }

            pub fn get_ref(&self) -> &W {
                &self.writer
            }

            pub fn get_mut(&mut self) -> &mut W {
                &mut self.writer
            }

            pub fn do_finish(&mut self) -> io::Result<()> {
                unavailable()
            }
        }

        impl<W> io::Write for Encoder<'_, W> {
            fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
                unavailable()
            }

            fn flush(&mut self) -> io::Result<()> {
                unavailable()
            }
        }
    }
}

pub mod dict {
    use std::io;
    use std::path::PathBuf;

    pub fn from_files<I: IntoIterator<Item = PathBuf>>(_files: I, _max_bytes: usize) -> io::Result<Vec<u8>> {
        crate::unavailable()
    }
}
