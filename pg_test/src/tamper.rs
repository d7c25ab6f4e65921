//! Spoils what a server sends, for the tests of mistrust: either plain noise in place of the stream,
//! or messages of the right form whose column values are noise. Knows just enough of the Postgres
//! protocol to find the values: a type byte, a length, and for a DataRow (`D`) its columns.

/// What the proxy does to the bytes from server to client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tamper {
    /// Noise instead of the next bytes; then the connection goes on as if nothing were.
    Noise { bytes: usize },
    /// The stream ends in the middle of the next message of at least this size.
    Truncate { at_least: usize },
    /// Flip bytes in the values of the next rows that have one of at least this many bytes; the
    /// form of the messages stays right.
    Values { at_least: usize, rows: usize },
}

/// Follows one server's stream from its first byte, so that messages can be found at any time.
#[derive(Default)]
pub struct Stream {
    pending: Vec<u8>,
    phase: Phase,
}

#[derive(Default, PartialEq, Eq)]
enum Phase {
    /// The client may ask for encryption; the server answers with one bare byte.
    #[default]
    Negotiating,
    Messages,
    /// Encrypted: passed on as it is.
    Opaque,
}

/// What goes to the client for some bytes from the server.
pub struct Passed {
    pub bytes: Vec<u8>,
    /// What is left to do of the order that was given; None when it is done.
    pub left: Option<Tamper>,
    /// Break the connection after these bytes.
    pub then_cut: bool,
}

impl Stream {
    /// Takes bytes from the server; whole messages come out, spoiled if there is an order to.
    pub fn pass(&mut self, bytes: &[u8], order: Option<Tamper>, random: &mut impl FnMut() -> u8) -> Passed {
        self.pending.extend_from_slice(bytes);
        let mut passed = Passed { bytes: Vec::new(), left: order, then_cut: false };
        while self.phase == Phase::Negotiating && !self.pending.is_empty() {
            match self.pending[0] {
                b'N' => passed.bytes.push(self.pending.remove(0)),
                b'S' | b'G' => self.phase = Phase::Opaque,
                _ => self.phase = Phase::Messages,
            }
        }
        if self.phase != Phase::Messages {
            passed.bytes.append(&mut self.pending);
            return passed;
        }
        while let Some(length) = whole_message(&self.pending) {
            let mut message: Vec<u8> = self.pending.drain(..length).collect();
            match passed.left {
                None => {}
                Some(Tamper::Noise { bytes }) => {
                    passed.bytes.extend((0..bytes).map(|_| random()));
                    passed.left = None;
                }
                Some(Tamper::Truncate { at_least }) if message.len() >= at_least => {
                    message.truncate(message.len() / 2);
                    passed.left = None;
                    passed.then_cut = true;
                }
                Some(Tamper::Values { at_least, rows })
                    if message[0] == b'D' && spoil(&mut message, at_least, random) =>
                {
                    passed.left = (rows > 1).then(|| Tamper::Values { at_least, rows: rows - 1 });
                }
                Some(Tamper::Truncate { .. } | Tamper::Values { .. }) => {}
            }
            passed.bytes.extend(message);
            if passed.then_cut {
                break;
            }
        }
        passed
    }
}

/// The length of the first message, if all of it is here.
fn whole_message(bytes: &[u8]) -> Option<usize> {
    let length = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize + 1;
    (bytes.len() >= length).then_some(length)
}

/// Flips up to seven bytes (an odd number, so that they never undo each other) in every value of at least this size.
fn spoil(row: &mut [u8], at_least: usize, random: &mut impl FnMut() -> u8) -> bool {
    let mut at = 7;
    let mut spoiled = false;
    while let Some(Ok(length)) = row.get(at..at + 4).map(<[u8; 4]>::try_from) {
        at += 4;
        let length = i32::from_be_bytes(length).max(0) as usize;
        if length >= at_least && at + length <= row.len() {
            for _ in 0..7 {
                let offset = usize::from(u16::from_be_bytes([random(), random()])) % length;
                row[at + offset] ^= random() | 1;
            }
            spoiled = true;
        }
        at += length;
    }
    spoiled
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first message of a server: authentication is done.
    const HELLO: &[u8] = b"R\0\0\0\x08\0\0\0\0";

    fn started() -> Stream {
        let mut stream = Stream::default();
        assert_eq!(stream.pass(b"N", None, &mut || 0).bytes, b"N", "encryption is declined at once");
        assert_eq!(stream.pass(HELLO, None, &mut || 0).bytes, HELLO);
        stream
    }

    fn row(values: &[&[u8]]) -> Vec<u8> {
        let mut body = (values.len() as u16).to_be_bytes().to_vec();
        for value in values {
            body.extend((value.len() as u32).to_be_bytes());
            body.extend(*value);
        }
        let mut message = vec![b'D'];
        message.extend((body.len() as u32 + 4).to_be_bytes());
        message.extend(body);
        message
    }

    #[test]
    fn whole_messages_pass_whatever_the_pieces() {
        let message = row(&[b"abc", b"defg"]);
        let mut stream = started();
        let mut out = Vec::new();
        for byte in message.repeat(3) {
            out.extend(stream.pass(&[byte], None, &mut || 0).bytes);
        }
        assert_eq!(out, message.repeat(3));
    }

    #[test]
    fn values_are_spoiled_in_place() {
        let message = row(&[b"ab", b"a long enough value"]);
        let order = Some(Tamper::Values { at_least: 10, rows: 1 });
        let passed = started().pass(&message, order, &mut || 3);
        assert_eq!(passed.bytes.len(), message.len());
        assert_eq!(passed.bytes[..13], message[..13], "the short value and the frame stay");
        assert_ne!(passed.bytes, message);
        assert_eq!(passed.left, None);
    }

    #[test]
    fn a_truncated_message_ends_the_stream() {
        let message = row(&[b"0123456789"]);
        let order = Some(Tamper::Truncate { at_least: 5 });
        let passed = started().pass(&message.repeat(2), order, &mut || 0);
        assert!(passed.then_cut);
        assert_eq!(passed.bytes, message[..message.len() / 2]);
    }
}
