// Package counter is a client of the shared counter that counts each addition once, through broken
// connections and restarts of the server. docs/protocol.md ("Sessions") is what it does; this file
// needs the standard library alone and is to be copied.
//
// A Client is one session. It keeps the amounts that have no reply, and when its connection breaks it
// opens another, learns how many of them are in the total, and sends the rest.
package counter

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"strconv"
	"sync"
	"time"
)

const (
	// MaxWindow is the largest number of frames that a session may leave unanswered.
	MaxWindow = 4096

	replyBytes = 8

	// The wait before a new connection begins with the first and doubles up to the last.
	firstWait = 10 * time.Millisecond
	lastWait  = 2 * time.Second

	// So many orderly ends of a first open in a row, and the server is said to have no sessions: one
	// that drains ends a hello in the same way.
	endsOfOldServer = 5

	noSuchSession = 1<<64 - 1
	noRoom        = 1<<64 - 2
	heldElsewhere = 1<<64 - 3
)

// What a call can fail with; errors.Is tells them apart. After all but ErrPending and ErrLimit the
// Client is of no use any more.
var (
	// ErrPending: the timeout is over. The additions stay in the session and will be sent: Settle
	// waits for them, and whoever adds them again adds them twice.
	ErrPending = errors.New("counter: not answered in time, still pending")
	// ErrUnreachable: no session could be opened in time; nothing was added.
	ErrUnreachable = errors.New("counter: no session was opened in time")
	// ErrLimit: an amount is above what the server takes. It was not counted, nor was any behind it.
	ErrLimit = errors.New("counter: the amount is above the server's limit")
	// ErrUnknown: the server knows the session no more, so nobody knows what became of the
	// additions that were sent and not answered.
	ErrUnknown = errors.New("counter: no such session, the outcome is unknown")
	// ErrLost: the server's store lost additions that it had answered.
	ErrLost = errors.New("counter: additions that were answered are lost")
	// ErrNoRoom: the server keeps as many sessions as it may.
	ErrNoRoom = errors.New("counter: no room for another session")
	// ErrUnsupported: the server has no sessions.
	ErrUnsupported = errors.New("counter: this server has no sessions")
	// ErrProtocol: what was answered is no answer.
	ErrProtocol = errors.New("counter: the answer is none of this protocol")
	// ErrClosed: the Client was closed.
	ErrClosed = errors.New("counter: closed")
)

// Options are how a Client works; the zero value is good.
type Options struct {
	Window  int           // frames that may be unanswered, 1 to MaxWindow; 0 is 64
	Timeout time.Duration // for one call, all its new connections included; 0 is 30 s

	// Connect makes a connection by then, for TLS and the like; nil is plain TCP.
	Connect func(address string, deadline time.Time) (net.Conn, error)
}

// Client is one session. Its calls may come from many goroutines, which take turns.
type Client struct {
	address string
	options Options
	idHigh  uint64
	idLow   uint64

	mutex  sync.Mutex
	conn   net.Conn // nil where there is none
	reader *bufio.Reader
	opened bool     // an open was answered
	have   uint64   // replies that came, over all connections
	amount []uint64 // all that have none, in their order: frames have+1, have+2, ...
	limit  uint64
	above  error // why amounts were withdrawn, until somebody is told
	dead   error // why the session is over
}

// Dial opens a session.
func Dial(address string, options Options) (*Client, error) {
	if options.Window == 0 {
		options.Window = 64
	}
	if options.Window < 1 || options.Window > MaxWindow {
		return nil, fmt.Errorf("counter: a window of %d frames: 1 to %d are possible", options.Window, MaxWindow)
	}
	if options.Timeout == 0 {
		options.Timeout = 30 * time.Second
	}
	if options.Connect == nil {
		options.Connect = func(address string, deadline time.Time) (net.Conn, error) {
			return (&net.Dialer{Deadline: deadline}).Dial("tcp", address)
		}
	}
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	c := &Client{
		address: address,
		options: options,
		idHigh:  binary.BigEndian.Uint64(id[:8]),
		idLow:   binary.BigEndian.Uint64(id[8:]),
		limit:   1<<64 - 1,
	}
	if err := c.untilDone(func() bool { return c.conn != nil }, new([]uint64), ErrUnreachable); err != nil {
		return nil, err
	}
	return c, nil
}

// Add adds an amount and gives back the total right after it. Adding 0 reads the total.
func (c *Client) Add(amount uint64) (uint64, error) {
	totals, err := c.AddAll([]uint64{amount})
	if err != nil {
		return 0, err
	}
	return totals[0], nil
}

// AddAll adds amounts in their order, as many at once as the window allows, and gives back the total
// after each. With ErrPending and ErrLimit come the totals that are known.
func (c *Client) AddAll(amounts []uint64) ([]uint64, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	earlier := len(c.amount) // what an ErrPending left: their totals are nobody's but Settle's
	for _, amount := range amounts {
		if err := c.checkLimit(amount); err != nil {
			return nil, err
		}
	}
	c.amount = append(c.amount, amounts...)
	totals, err := c.settle()
	if len(totals) < earlier {
		return nil, err
	}
	return totals[earlier:], err
}

// Settle waits for all additions that are pending and gives back the total after each.
func (c *Client) Settle() ([]uint64, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.settle()
}

// Close ends the session. Additions that are pending are waited for; where that fails, or the end is
// not answered, the server forgets the session later, by itself.
func (c *Client) Close() error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if errors.Is(c.dead, ErrClosed) {
		return nil
	}
	_, err := c.settle()
	if err == nil && c.conn == nil {
		err = c.connect(time.Now().Add(c.options.Timeout), new([]uint64))
	}
	if err == nil {
		err = c.end()
	}
	c.drop()
	c.dead = ErrClosed
	return err
}

func (c *Client) settle() ([]uint64, error) {
	totals := make([]uint64, 0, len(c.amount))
	err := c.untilDone(func() bool { return len(c.amount) == 0 }, &totals, ErrPending)
	if err == nil {
		err, c.above = c.above, nil
	}
	return totals, err
}

// untilDone goes on through any number of connections until it is done, the session is over, or the
// time is: then it fails as `late` says.
func (c *Client) untilDone(done func() bool, totals *[]uint64, late error) error {
	deadline := time.Now().Add(c.options.Timeout)
	wait, ends := firstWait, 0
	for !done() {
		if c.dead != nil {
			return c.dead
		}
		before := c.have
		err := c.step(deadline, totals)
		if err == nil {
			continue
		}
		c.drop()
		if c.dead != nil {
			return c.dead
		}
		if c.have > before {
			wait = firstWait
		}
		if ends = countEnds(ends, err); ends == endsOfOldServer && !c.opened {
			c.dead = ErrUnsupported
			return c.dead
		}
		pause := wait/2 + time.Duration(randomBelow(uint64(wait)))
		if time.Now().Add(pause).After(deadline) {
			return fmt.Errorf("%w: %s: %v", late, c.address, err)
		}
		time.Sleep(pause)
		if wait *= 2; wait > lastWait {
			wait = lastWait
		}
	}
	return nil
}

// countEnds counts orderly ends without a byte, in a row.
func countEnds(ends int, err error) int {
	if errors.Is(err, io.EOF) {
		return ends + 1
	}
	return 0
}

// step connects where there is no connection, or sends a window of frames and reads their replies. An
// error means that the connection is of no use any more.
func (c *Client) step(deadline time.Time, totals *[]uint64) error {
	if c.conn == nil {
		return c.connect(deadline, totals)
	}
	return c.exchange(deadline, totals)
}

func (c *Client) connect(deadline time.Time, totals *[]uint64) error {
	conn, err := c.options.Connect(c.address, deadline)
	if err != nil {
		return err
	}
	c.conn, c.reader = conn, bufio.NewReader(conn)
	conn.SetDeadline(deadline)
	hello := appendControl(appendControl(nil, "id-high", c.idHigh), "id-low", c.idLow)
	if c.opened {
		hello = appendControl(hello, "resume", c.have)
	} else {
		hello = appendControl(hello, "open", uint64(c.options.Window))
	}
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	return c.readAnswer(totals)
}

// readAnswer reads what answers a hello, pair by pair: what a pair says holds also where the answer
// breaks off behind it.
func (c *Client) readAnswer(totals *[]uint64) error {
	applied, err := c.readWord()
	if err != nil {
		return err
	}
	if err := c.refusal(applied); err != nil {
		return err
	}
	limit, err := c.readWord()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // it has begun to answer
	}
	if err != nil {
		return err
	}
	if applied < c.have {
		c.dead = fmt.Errorf("%w: %d of %d", ErrLost, c.have-applied, c.have)
		return c.dead
	}
	if applied-c.have > uint64(len(c.amount)) || (!c.opened && applied > 0) {
		return c.noAnswer("%d applied, %d answered, %d more sent", applied, c.have, len(c.amount))
	}
	c.opened, c.limit = true, limit
	for c.have < applied {
		if err := c.readPair(applied, totals); err != nil {
			return err
		}
	}
	c.heedLimit()
	return nil
}

// readPair takes the totals of the frames up to the pair's.
func (c *Client) readPair(applied uint64, totals *[]uint64) error {
	last, err := c.readWord()
	if err != nil {
		return err
	}
	total, err := c.readWord()
	if err != nil {
		return err
	}
	if last <= c.have || last > applied {
		return c.noAnswer("a pair of frame %d, after %d of %d", last, c.have, applied)
	}
	frames := int(last - c.have)
	part := make([]uint64, frames)
	for i := frames - 1; i >= 0; i-- {
		part[i] = total
		total -= c.amount[i] // modulo 2^64
	}
	*totals = append(*totals, part...)
	c.answered(frames)
	return nil
}

// refusal gives back why a hello was refused; nil if it was not.
func (c *Client) refusal(applied uint64) error {
	switch applied {
	case noSuchSession:
		c.dead = fmt.Errorf("%w: of %d additions", ErrUnknown, len(c.amount))
	case noRoom:
		c.dead = ErrNoRoom
	case heldElsewhere:
		return errors.New("the session is held by another connection")
	}
	return c.dead
}

func (c *Client) noAnswer(format string, values ...any) error {
	c.dead = fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, values...))
	return c.dead
}

// heedLimit withdraws what this server would refuse, and what is behind it: none of it is counted, as
// the answer to the hello has just said, and the connection before cannot count it any more.
func (c *Client) heedLimit() {
	for i, amount := range c.amount {
		if c.above = c.checkLimit(amount); c.above != nil {
			c.amount = c.amount[:i]
			return
		}
	}
}

func (c *Client) checkLimit(amount uint64) error {
	if amount > c.limit {
		return fmt.Errorf("%w: %d, above %d", ErrLimit, amount, c.limit)
	}
	return nil
}

func (c *Client) exchange(deadline time.Time, totals *[]uint64) error {
	c.conn.SetDeadline(deadline)
	count := len(c.amount)
	if count > c.options.Window {
		count = c.options.Window
	}
	var frames []byte
	for _, amount := range c.amount[:count] {
		frames = appendFrame(frames, amount)
	}
	if _, err := c.conn.Write(frames); err != nil {
		return err
	}
	for ; count > 0; count-- {
		total, err := c.readWord()
		if err != nil {
			return err
		}
		*totals = append(*totals, total)
		c.answered(1)
	}
	return nil
}

// answered takes off the oldest amounts, whose totals are known.
func (c *Client) answered(frames int) {
	c.have += uint64(frames)
	c.amount = c.amount[frames:]
}

func (c *Client) end() error {
	c.conn.SetDeadline(time.Now().Add(c.options.Timeout))
	if _, err := c.conn.Write(appendControl(nil, "end", c.have)); err != nil {
		return err
	}
	applied, err := c.readWord()
	if err == nil && applied != c.have {
		err = c.noAnswer("%d applied at the end, %d answered", applied, c.have)
	}
	return err
}

func (c *Client) drop() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// readWord reads 8 bytes; io.EOF only where the connection ended in order in front of the first.
func (c *Client) readWord() (uint64, error) {
	var data [replyBytes]byte
	if _, err := io.ReadFull(c.reader, data[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(data[:]), nil
}

// randomBelow is evenly spread enough for a pause.
func randomBelow(bound uint64) uint64 {
	var data [8]byte
	if _, err := rand.Read(data[:]); err != nil {
		return bound / 2
	}
	return binary.BigEndian.Uint64(data[:]) % bound
}

func appendFrame(data []byte, amount uint64) []byte {
	data = binary.BigEndian.AppendUint64(data, amount)
	return binary.BigEndian.AppendUint64(data, checksum(strconv.AppendUint(nil, amount, 10)))
}

func appendControl(data []byte, kind string, value uint64) []byte {
	text := strconv.AppendUint([]byte(kind+":"), value, 10)
	data = binary.BigEndian.AppendUint64(data, value)
	return binary.BigEndian.AppendUint64(data, checksum(text))
}

const (
	prime1 = 0x9E3779B185EBCA87
	prime2 = 0xC2B2AE3D27D4EB4F
	prime3 = 0x165667B19E3779F9
	prime4 = 0x85EBCA77C2B2AE63
	prime5 = 0x27D4EB2F165667C5
)

// checksum is XXH64, seed 0, of a text below 32 bytes; the longest here has 28.
func checksum(text []byte) uint64 {
	hash := uint64(prime5) + uint64(len(text))
	for ; len(text) >= 8; text = text[8:] {
		lane := binary.LittleEndian.Uint64(text)
		hash ^= bits.RotateLeft64(lane*prime2, 31) * prime1
		hash = bits.RotateLeft64(hash, 27)*prime1 + prime4
	}
	if len(text) >= 4 {
		hash ^= uint64(binary.LittleEndian.Uint32(text)) * prime1
		hash = bits.RotateLeft64(hash, 23)*prime2 + prime3
		text = text[4:]
	}
	for _, digit := range text {
		hash ^= uint64(digit) * prime5
		hash = bits.RotateLeft64(hash, 11) * prime1
	}
	hash = (hash ^ hash>>33) * prime2
	hash = (hash ^ hash>>29) * prime3
	return hash ^ hash>>32
}
