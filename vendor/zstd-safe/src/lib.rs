//! The interface of `zstd-safe` as pingora-header-serde uses it; every operation fails. Why: ../zstd/Cargo.toml.

use std::marker::PhantomData;

pub type ErrorCode = usize;
pub type SafeResult = Result<usize, ErrorCode>;

pub const CONTENTSIZE_UNKNOWN: u64 = u64::MAX;
pub const CONTENTSIZE_ERROR: u64 = u64::MAX - 1;

const UNAVAILABLE: ErrorCode = 1;

pub struct ContentSizeError;

pub fn get_error_name(_code: ErrorCode) -> &'static str {
    "this build has no zstd"
}

pub fn get_frame_content_size(_frame: &[u8]) -> Result<Option<u64>, ContentSizeError> {
    Err(ContentSizeError)
}

pub fn compress_bound(bytes: usize) -> usize {
    bytes
}

pub trait WriteBuf {}

impl WriteBuf for Vec<u8> {}

pub struct CDict<'a>(PhantomData<&'a ()>);
pub struct DDict<'a>(PhantomData<&'a ()>);
pub struct CCtx<'a>(PhantomData<&'a ()>);
pub struct DCtx<'a>(PhantomData<&'a ()>);

impl CDict<'_> {
    pub fn create(_dictionary: &[u8], _level: i32) -> Self {
        Self(PhantomData)
    }
}

impl DDict<'_> {
    pub fn create(_dictionary: &[u8]) -> Self {
        Self(PhantomData)
    }
}

impl CCtx<'_> {
    pub fn create() -> Self {
        Self(PhantomData)
    }

    pub fn compress<C: WriteBuf + ?Sized>(&mut self, _into: &mut C, _from: &[u8], _level: i32) -> SafeResult {
        Err(UNAVAILABLE)
    }

    pub fn compress_using_cdict<C: WriteBuf + ?Sized>(
        &mut self,
        _into: &mut C,
        _from: &[u8],
        _dictionary: &CDict<'_>,
    ) -> SafeResult {
        Err(UNAVAILABLE)
    }
}

impl DCtx<'_> {
    pub fn create() -> Self {
        Self(PhantomData)
    }

    pub fn decompress<C: WriteBuf + ?Sized>(&mut self, _into: &mut C, _from: &[u8]) -> SafeResult {
        Err(UNAVAILABLE)
    }

    pub fn decompress_using_ddict<C: WriteBuf + ?Sized>(
        &mut self,
        _into: &mut C,
        _from: &[u8],
        _dictionary: &DDict<'_>,
    ) -> SafeResult {
        Err(UNAVAILABLE)
    }
}
