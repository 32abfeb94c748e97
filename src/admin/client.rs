//! The commands' side of the admin API: one request, one answer.

use std::net::SocketAddr;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::api::Failure;
use crate::config::{Admin, Secret};

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("no pgtandem answers at {address} (admin in proxy.yaml): {cause}; is `pgtandem serve` running?")]
    NotRunning { address: SocketAddr, cause: String },
    #[error("the running proxy refused: {0}")]
    Refused(String),
    #[error("the answer of {address} is not pgtandem's: {cause}")]
    Unreadable { address: SocketAddr, cause: String },
}

/// A client of one running proxy.
pub struct AdminClient {
    address: SocketAddr,
    token: Option<Secret>,
}

impl AdminClient {
    pub fn new(admin: &Admin) -> Self {
        let mut address = admin.address;
        // A server bound to every address is asked through loopback.
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        Self {
            address,
            token: admin.token.clone(),
        }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AdminError> {
        self.ask(Method::GET, path, Bytes::new()).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl serde::Serialize) -> Result<T, AdminError> {
        let body = serde_json::to_vec(body).map_err(|error| self.unreadable(error))?;
        self.ask(Method::POST, path, body.into()).await
    }

    /// Hands over each JSON line of the answer as it comes.
    pub async fn post_for_lines<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl serde::Serialize,
        mut each: impl FnMut(T),
    ) -> Result<(), AdminError> {
        let body = serde_json::to_vec(body).map_err(|error| self.unreadable(error))?;
        let (mut sender, connection) = self.connect().await?;
        // Ended with this call, whoever drops it.
        let _driver = AbortOnDropHandle::new(tokio::spawn(async move {
            connection.await.ok();
        }));
        let request = self.request(Method::POST, path, body.into())?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.unreadable(error))?;
        let status = response.status();
        let mut body = response.into_body();
        let mut left: Vec<u8> = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.unreadable(error))?;
            let Ok(data) = frame.into_data() else { continue };
            left.extend_from_slice(&data);
            while status.is_success()
                && let Some(end) = left.iter().position(|byte| *byte == b'\n')
            {
                each(serde_json::from_slice(&left[..end]).map_err(|error| self.unreadable(error))?);
                left.drain(..=end);
            }
        }
        if status.is_success() {
            return Ok(());
        }
        match serde_json::from_slice::<Failure>(&left) {
            Ok(failure) => Err(AdminError::Refused(failure.error)),
            Err(_) => Err(self.unreadable(format!("status {status}"))),
        }
    }

    async fn connect(
        &self,
    ) -> Result<(SendRequest<Full<Bytes>>, Connection<TokioIo<TcpStream>, Full<Bytes>>), AdminError> {
        let not_running = |cause: String| AdminError::NotRunning {
            address: self.address,
            cause,
        };
        let stream = TcpStream::connect(self.address)
            .await
            .map_err(|error| not_running(error.to_string()))?;
        http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| not_running(error.to_string()))
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, AdminError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        request.body(Full::new(body)).map_err(|error| self.unreadable(error))
    }

    /// The answer's document, whether the status says yes (2xx) or no (408, 409): both carry
    /// one. Anything else is a [`Failure`].
    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, AdminError> {
        let not_running = |cause: String| AdminError::NotRunning {
            address: self.address,
            cause,
        };
        let (mut sender, connection) = self.connect().await?;
        let request = self.request(method, path, body)?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        let (status, body) = tokio::select! {
            answer = exchange => answer.map_err(|error| self.unreadable(error))?,
            ended = connection => return Err(not_running(match ended {
                Ok(()) => "the connection was closed".into(),
                Err(error) => error.to_string(),
            })),
        };
        if status.is_success() || status == StatusCode::CONFLICT || status == StatusCode::REQUEST_TIMEOUT {
            return serde_json::from_slice(&body).map_err(|error| self.unreadable(error));
        }
        match serde_json::from_slice::<Failure>(&body) {
            Ok(failure) => Err(AdminError::Refused(failure.error)),
            Err(_) => Err(self.unreadable(format!("status {status}"))),
        }
    }

    fn unreadable(&self, cause: impl ToString) -> AdminError {
        AdminError::Unreadable {
            address: self.address,
            cause: cause.to_string(),
        }
    }
}

/// A value for the query part of a path.
pub fn query_value(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
