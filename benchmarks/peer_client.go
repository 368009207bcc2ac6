//go:build ignore

// Question: how many additions a second does a pair of Go server and Go client make on one machine?
// A goroutine per connection, each with one frame in flight, all released together; every reply is
// checked to rise.
//
// Command: go build -o peer_client peer_client.go && ./peer_client --port 8080 --seconds 10
// prints one JSON object; ends with status 1 on a wrong reply or a lost connection.
//
// Invalid if: it is held against a client that does less for a request: it takes the time of every
// reply, but it keeps no latencies.
package main

import (
	"encoding/binary"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"time"
)

const (
	replyBytes  = 8
	oneChecksum = 0xb7b41276360564d4 // of the amount 1, from docs/protocol.md
)

type result struct {
	Requests       int     `json:"requests"` // of the measured part
	ElapsedS       float64 `json:"elapsed_s"`
	RequestsPerSec float64 `json:"requests_per_s"`
}

// load sends additions of 1 until `end`; it gives back how many were answered since `begin`.
func load(conn net.Conn, begin, end time.Time) int {
	frame := binary.BigEndian.AppendUint64(nil, 1)
	frame = binary.BigEndian.AppendUint64(frame, oneChecksum)
	reply := make([]byte, replyBytes)
	var last uint64
	measured := 0
	for {
		if _, err := conn.Write(frame); err != nil {
			log.Fatal(err)
		}
		if _, err := io.ReadFull(conn, reply); err != nil {
			log.Fatal(err)
		}
		total := binary.BigEndian.Uint64(reply)
		if total <= last {
			log.Fatalf("wrong total %d: this connection was told %d before", total, last)
		}
		last = total
		now := time.Now()
		if now.After(end) {
			return measured
		}
		if now.After(begin) {
			measured++
		}
	}
}

func main() {
	port := flag.Int("port", 8080, "of a server on 127.0.0.1")
	connections := flag.Int("connections", 40, "connections, each with one frame in flight")
	warmup := flag.Float64("warmup", 0.2, "seconds before the measured part")
	seconds := flag.Float64("seconds", 10, "seconds measured")
	flag.Parse()

	conns := make([]net.Conn, *connections)
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(*port)); err != nil {
			log.Fatal(err)
		}
	}
	begin := time.Now().Add(time.Duration(*warmup * float64(time.Second)))
	end := begin.Add(time.Duration(*seconds * float64(time.Second)))
	counts := make(chan int)
	for _, conn := range conns {
		conn.SetDeadline(end.Add(10 * time.Second))
		go func(conn net.Conn) { counts <- load(conn, begin, end) }(conn)
	}
	requests := 0
	for range conns {
		requests += <-counts
	}
	rate := float64(requests) / *seconds
	if err := json.NewEncoder(os.Stdout).Encode(result{requests, *seconds, rate}); err != nil {
		log.Fatal(err)
	}
}
