//go:build ignore

// Question: what does Go reach with the same protocol, one goroutine per connection? A connection
// reads what has arrived, adds it once, and answers it with one write; its buffer begins small, so
// that an idle connection is cheap, and grows while reads fill it, so that deep pipelines are fast.
//
// Command: go build -o peer peer.go && GOMAXPROCS=1 ./peer [PORT]     (0, the default, takes a free
// port; without GOMAXPROCS it uses every core it may)
//
// Invalid if: the server shares a core with its load generator, or GOMAXPROCS differs from what the
// servers beside it may use. XXH64 is written here because a benchmark must not fetch a module.
package main

import (
	"encoding/binary"
	"fmt"
	"log"
	"math/bits"
	"net"
	"os"
	"strconv"
	"sync/atomic"
)

const (
	frameBytes      = 16
	replyBytes      = 8
	firstReadBytes  = 256
	largestReadSize = 65536

	prime1 = 0x9E3779B185EBCA87
	prime2 = 0xC2B2AE3D27D4EB4F
	prime3 = 0x165667B19E3779F9
	prime4 = 0x85EBCA77C2B2AE63
	prime5 = 0x27D4EB2F165667C5
)

var total uint64

// checksum is XXH64, seed 0, of a text below 32 bytes: an amount has at most 20 digits.
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

// add verifies whole frames and adds those before the first bad one, at once. It gives back their
// replies, in the buffer it was given, and whether all were good.
func add(frames, replies []byte) ([]byte, bool) {
	var digits [20]byte
	var sum uint64
	good := true
	replies = replies[:0]
	for ; len(frames) > 0; frames = frames[frameBytes:] {
		amount := binary.BigEndian.Uint64(frames)
		text := strconv.AppendUint(digits[:0], amount, 10)
		if good = binary.BigEndian.Uint64(frames[8:]) == checksum(text); !good {
			break
		}
		sum += amount
		replies = binary.BigEndian.AppendUint64(replies, sum)
	}
	before := atomic.AddUint64(&total, sum) - sum
	for at := 0; at < len(replies); at += replyBytes {
		reply := replies[at : at+replyBytes]
		binary.BigEndian.PutUint64(reply, before+binary.BigEndian.Uint64(reply))
	}
	return replies, good
}

func serve(conn net.Conn) {
	defer conn.Close()
	buffer := make([]byte, firstReadBytes)
	replies := make([]byte, 0, firstReadBytes/2)
	held := 0
	for {
		read, err := conn.Read(buffer[held:])
		if err != nil {
			return
		}
		bytes := held + read
		whole := bytes - bytes%frameBytes
		var good bool
		replies, good = add(buffer[:whole], replies)
		if _, err := conn.Write(replies); err != nil || !good {
			return
		}
		filled := bytes == len(buffer)
		rest := buffer[whole:bytes]
		if filled && len(buffer) < largestReadSize {
			buffer = make([]byte, 2*len(buffer))
		}
		held = copy(buffer, rest)
	}
}

func main() {
	port := "0"
	if len(os.Args) > 1 {
		port = os.Args[1]
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("Listening on %s\n", listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn)
	}
}
