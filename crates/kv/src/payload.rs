//! The valid rows of a block on their way from one memory to another.

use crate::Digest;
use bytes::{Buf, Bytes};

/// The valid rows of a block, with the digest that they had in the memory they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    pub bytes: Pieces,
    pub digest: Digest,
}

impl Payload {
    /// With the digest of `bytes` as they are here.
    pub fn new(bytes: impl Into<Pieces>) -> Payload {
        let bytes = bytes.into();
        Payload { digest: Digest::of_parts(bytes.iter()), bytes }
    }
}

/// Bytes in the pieces in which they were heard: they are copied once, to where they belong, and never together before.
#[derive(Clone, Debug, Default)]
pub struct Pieces(Vec<Bytes>);

impl Pieces {
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|piece| &piece[..])
    }

    /// From the first byte on.
    pub fn reader(&self) -> Reader<'_> {
        Reader { current: &[], rest: &self.0 }
    }

    /// Without the first `count` bytes.
    pub fn after(mut self, mut count: usize) -> Pieces {
        for piece in &mut self.0 {
            let here = count.min(piece.len());
            piece.advance(here);
            count -= here;
        }
        self
    }

    /// In one piece, which is a copy if there are several.
    pub fn together(&self) -> Bytes {
        match &self.0[..] {
            [one] => one.clone(),
            pieces => pieces.concat().into(),
        }
    }
}

impl From<Bytes> for Pieces {
    fn from(piece: Bytes) -> Pieces {
        Pieces(vec![piece])
    }
}

impl From<Vec<u8>> for Pieces {
    fn from(piece: Vec<u8>) -> Pieces {
        Bytes::from(piece).into()
    }
}

impl FromIterator<Bytes> for Pieces {
    fn from_iter<I: IntoIterator<Item = Bytes>>(pieces: I) -> Pieces {
        Pieces(pieces.into_iter().collect())
    }
}

/// The same bytes, however they are cut.
impl PartialEq for Pieces {
    fn eq(&self, other: &Pieces) -> bool {
        self.iter().flatten().eq(other.iter().flatten())
    }
}

impl Eq for Pieces {}

/// Reads pieces one after the other.
pub struct Reader<'a> {
    current: &'a [u8],
    rest: &'a [Bytes],
}

impl Buf for Reader<'_> {
    fn remaining(&self) -> usize {
        self.current.len() + self.rest.iter().map(Bytes::len).sum::<usize>()
    }

    fn chunk(&self) -> &[u8] {
        if self.current.is_empty() {
            return self.rest.iter().find(|piece| !piece.is_empty()).map_or(&[], |piece| &piece[..]);
        }
        self.current
    }

    fn advance(&mut self, mut count: usize) {
        while count > self.current.len() {
            count -= self.current.len();
            let (next, rest) = self.rest.split_first().expect("no more is taken than there is");
            (self.current, self.rest) = (next, rest);
        }
        self.current = &self.current[count..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_pieces_are_cut_does_not_matter() {
        let whole: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        for cut in [1, 7, 4096, 9_999, 20_000] {
            let pieces: Pieces = whole.chunks(cut).map(Bytes::copy_from_slice).collect();
            assert_eq!((pieces.len(), &pieces.together()[..]), (whole.len(), &whole[..]), "{cut}");
            assert_eq!(Payload::new(pieces.clone()), Payload::new(whole.clone()), "{cut}");
            let (mut reader, mut read) = (pieces.reader(), vec![0; 10_000]);
            read.chunks_mut(33).for_each(|part| reader.copy_to_slice(part));
            assert!(read == whole && reader.remaining() == 0, "{cut}");
        }
        let pieces: Pieces = whole.chunks(7).map(Bytes::copy_from_slice).collect();
        assert_eq!(pieces.after(100).together(), &whole[100..]);
        let empty: Pieces = [Bytes::new(), Bytes::from_static(&[1]), Bytes::new()].into_iter().collect();
        assert_eq!((empty.reader().chunk(), empty.is_empty()), (&[1][..], false));
        assert!(Pieces::default().is_empty() && Pieces::default().together().is_empty());
    }
}
